//! `mindseye-tools eval objects`: things placed from a detector's boxes alone, against depth.
//!
//! Boxes in the frames of the context make things in the map, as on a robot: bearings and poses, no depth. Then, in other
//! frames, each whole box is placed by the depth that the dataset has there, and compared with the nearest thing of
//! its class: how far apart, and by which angle as seen from that frame. The reference is the same detector plus depth at the
//! front of the thing, so this is consistency, and things that the context never showed count as errors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use mindseye_engines::detector::{Detection, Detector, DetectorError};
use mindseye_landmarks::{Camera, MapObject, ObjectConfig, ObjectCounts, ObjectMap, SeenBox};
use nalgebra::{Isometry3, Point3, Vector2};
use serde::Serialize;

use super::localise::{Span, Spread, camera_of, chosen};
use super::stats::{Figure, share};
use crate::curate::dataset::{Dataset, DatasetError, Frame, Picture, Recording};

/// Arguments of `eval objects`.
#[derive(clap::Args, Debug)]
pub struct ObjectsArgs {
    /// Directory of the dataset.
    pub dataset: PathBuf,
    /// Recording of the dataset; may be left out where there is only one.
    #[arg(long)]
    pub recording: Option<String>,
    /// Frames whose boxes make things, A:B:STEP: from index A, before index B, every STEP-th.
    #[arg(long)]
    pub context: Span,
    /// Frames whose boxes are placed by depth; none may be in the context.
    #[arg(long)]
    pub query: Span,
    /// The detector (ONNX).
    #[arg(long)]
    pub detector: PathBuf,
    /// Names of its classes, one a line, where they are neither in the file nor beside it.
    #[arg(long)]
    pub classes: Option<PathBuf>,
    /// Least score of a box that counts.
    #[arg(long, default_value_t = 0.4)]
    pub score_min: f64,
    /// Focal length of the stored colour pictures (pixels) in place of the dataset's.
    #[arg(long)]
    pub focal: Option<f64>,
    /// Focal length of the depth pictures (pixels) where it is another than the colour's, with one centre.
    #[arg(long)]
    pub depth_focal: Option<f64>,
    /// Ending of the depth picture's name in place of the colour picture's: FROM=TO.
    #[arg(long, default_value = ".color.jpg=.depth.png")]
    pub depth_name: String,
    /// Print the report as one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// A thing of the context.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Thing {
    /// Its class.
    pub class: String,
    /// Its middle in the map (metres).
    pub position: [f64; 3],
    /// Standard deviation along its worst axis (metres).
    pub sigma_m: f64,
    /// Width and height (metres).
    pub size_m: [f64; 2],
    /// Frames that saw it.
    pub views: u32,
}

/// Errors of one class, or of all.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Errors {
    /// Boxes with depth, and a thing of their class to compare with.
    pub boxes: usize,
    /// Boxes with depth of a class that the context has no thing of.
    pub unknown: usize,
    /// Distances (metres).
    pub position_m: Spread,
    /// Angles as seen from the frame (degrees).
    pub heading_deg: Spread,
    /// Share within 0.3 m.
    pub within_30cm: Figure,
    /// Share inside the thing's 90 % ellipsoid.
    pub within_90: Figure,
}

/// What `eval objects` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// All classes together.
    pub all: Errors,
    /// By class.
    pub classes: BTreeMap<String, Errors>,
    /// Things of the context.
    pub things: Vec<Thing>,
    /// Frames of the context that were used.
    pub context: usize,
    /// Frames with depth that were asked.
    pub queries: usize,
    /// Frames that could not be used: unreadable, without pose, intrinsics or (of the queries) depth.
    pub unusable: usize,
    /// Boxes that were cut off, seen again, or forgotten, in the context.
    #[serde(skip)]
    pub counts: ObjectCounts,
    /// Median time of the detector (milliseconds by the wall clock).
    pub ms_per_frame: Option<f64>,
}

/// One comparison.
struct Case {
    class: usize,
    position_m: f64,
    heading_deg: f64,
    inside: bool,
}

/// Runs `eval objects`.
///
/// # Errors
/// A dataset, recording or detector that cannot be used, spans that overlap or are empty.
pub fn run(args: &ObjectsArgs) -> anyhow::Result<ExitCode> {
    let dataset = Dataset::open(&args.dataset)?;
    let recording = chosen(&dataset, args.recording.as_deref())?;
    let mut detector = Detector::open(&args.detector, args.classes.as_deref(), 1)?;
    let report = evaluate(&dataset, recording, &mut detector, args)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(ExitCode::SUCCESS)
}

fn evaluate(
    dataset: &Dataset,
    recording: &Recording,
    detector: &mut Detector,
    args: &ObjectsArgs,
) -> anyhow::Result<Report> {
    let (from, to) = args.depth_name.split_once('=').context("--depth-name: wanted FROM=TO")?;
    check_spans(recording, args)?;
    let mut visit = Visit::new(detector.classes().len());
    visit.read(dataset, recording, args, args.context, &mut |visit, seen| {
        let boxes = visit.boxes(detector, args.score_min, seen)?;
        visit.context += 1;
        visit.map.insert(&boxes, &seen.camera, &seen.map_from_camera);
        Ok(())
    })?;
    visit.read(dataset, recording, args, args.query, &mut |visit, seen| {
        let boxes = visit.boxes(detector, args.score_min, seen)?;
        let depth = dataset.beside(recording, seen.frame, from, to).map(|path| Depth::read(&path));
        let Some(Ok(depth)) = depth else {
            visit.unusable += 1;
            return Ok(());
        };
        visit.queries += 1;
        let scale = args.depth_focal.map_or(1.0, |f| f / seen.camera.focal_mean());
        boxes.iter().for_each(|b| visit.compare(b, &depth, scale, seen));
        Ok(())
    })?;
    Ok(visit.report(detector.classes()))
}

/// Refuses spans that are empty or overlap.
fn check_spans(recording: &Recording, args: &ObjectsArgs) -> anyhow::Result<()> {
    let count = |span: Span| recording.frames.iter().filter(move |f| span.contains(f.index)).count();
    anyhow::ensure!(
        count(args.context) > 0 && count(args.query) > 0,
        "{} frames of context, {} queries; indices go to {}",
        count(args.context),
        count(args.query),
        recording.frames.last().map_or(0, |f| f.index)
    );
    let both = |f: &&Frame| args.context.contains(f.index) && args.query.contains(f.index);
    match recording.frames.iter().find(both) {
        Some(frame) => anyhow::bail!("frame {} is context and query", frame.index),
        None => Ok(()),
    }
}

/// A frame that can be used.
struct Seen<'a> {
    frame: &'a Frame,
    picture: Picture,
    camera: Camera,
    map_from_camera: Isometry3<f64>,
}

/// What was seen so far.
struct Visit {
    map: ObjectMap,
    cases: Vec<Case>,
    /// Boxes of the queries of which no thing is known, by class.
    unknown: Vec<usize>,
    times: Vec<f64>,
    context: usize,
    queries: usize,
    unusable: usize,
}

impl Visit {
    fn new(classes: usize) -> Self {
        Self {
            map: ObjectMap::new(ObjectConfig::default()),
            cases: Vec::new(),
            unknown: vec![0; classes],
            times: Vec::new(),
            context: 0,
            queries: 0,
            unusable: 0,
        }
    }

    /// Gives the frames of a span that can be used, until one fails.
    fn read(
        &mut self,
        dataset: &Dataset,
        recording: &Recording,
        args: &ObjectsArgs,
        span: Span,
        each: &mut dyn FnMut(&mut Self, &Seen<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let wanted = |at: usize| span.contains(recording.frames[at].index);
        let mut failure = None;
        dataset.pictures_at(recording, &wanted, &mut |at, picture| {
            if failure.is_some() {
                return Ok(());
            }
            let frame = &recording.frames[at];
            let used = usable(picture, frame, args.focal, &mut failure).zip(frame.map_from_camera);
            match used {
                Some(((picture, camera), map_from_camera)) => {
                    failure = each(self, &Seen { frame, picture, camera, map_from_camera }).err();
                }
                None => self.unusable += 1,
            }
            Ok::<(), DatasetError>(())
        })?;
        failure.map_or(Ok(()), Err)
    }

    /// The detector's boxes in a frame.
    fn boxes(
        &mut self,
        detector: &mut Detector,
        score_min: f64,
        seen: &Seen<'_>,
    ) -> Result<Vec<SeenBox>, DetectorError> {
        let Picture { rgb, width, height } = &seen.picture;
        let began = Instant::now();
        let found = detector.detect(rgb, (*width, *height), score_min as f32)?;
        self.times.push(began.elapsed().as_secs_f64() * 1e3);
        let of = |d: &Detection| SeenBox {
            class: d.class,
            score: f64::from(d.score),
            area: d.area.map(f64::from),
        };
        Ok(found.iter().map(of).collect())
    }

    /// Compares the place of a box by depth with the nearest thing of its class.
    fn compare(&mut self, seen: &SeenBox, depth: &Depth, scale: f64, at: &Seen<'_>) {
        let Some(place) = depth.place(seen, &at.camera, scale) else { return };
        let truth = at.map_from_camera * place;
        let apart = |o: &&MapObject| (o.position - truth).norm();
        let of_class = self.map.objects().iter().filter(|o| o.class == seen.class);
        let Some(thing) = of_class.min_by(|a, b| apart(a).total_cmp(&apart(b))) else {
            self.unknown[seen.class] += 1;
            return;
        };
        let there = at.map_from_camera.inverse_transform_point(&thing.position);
        let off = thing.position - truth;
        let d2 = thing.covariance.try_inverse().map_or(f64::INFINITY, |s| (off.transpose() * s * off)[0]);
        self.cases.push(Case {
            class: seen.class,
            position_m: off.norm(),
            heading_deg: there.coords.angle(&place.coords).to_degrees(),
            // 90 % of a chi-square with three degrees of freedom.
            inside: d2 < 6.251,
        });
    }

    /// Errors of one class, or of all.
    fn errors(&self, class: Option<usize>) -> Errors {
        let ours: Vec<&Case> = self.cases.iter().filter(|c| class.is_none_or(|k| c.class == k)).collect();
        let each = |f: &dyn Fn(&Case) -> f64| ours.iter().map(|c| f(c)).collect::<Vec<f64>>();
        Errors {
            boxes: ours.len(),
            unknown: class.map_or_else(|| self.unknown.iter().sum(), |k| self.unknown[k]),
            position_m: Spread::of(&each(&|c| c.position_m)),
            heading_deg: Spread::of(&each(&|c| c.heading_deg)),
            within_30cm: share(ours.iter().map(|c| c.position_m <= 0.3)),
            within_90: share(ours.iter().map(|c| c.inside)),
        }
    }

    fn report(&self, names: &[String]) -> Report {
        let met = |k: &usize| self.unknown[*k] > 0 || self.cases.iter().any(|c| c.class == *k);
        let thing = |o: &MapObject| Thing {
            class: names[o.class].clone(),
            position: [o.position.x, o.position.y, o.position.z],
            sigma_m: o.sigma_m(),
            size_m: o.size,
            views: o.views,
        };
        Report {
            all: self.errors(None),
            classes: (0..names.len()).filter(met).map(|k| (names[k].clone(), self.errors(Some(k)))).collect(),
            things: self.map.objects().iter().map(thing).collect(),
            context: self.context,
            queries: self.queries,
            unusable: self.unusable,
            counts: self.map.counts(),
            ms_per_frame: Spread::of(&self.times).median,
        }
    }
}

/// A picture that could be read, and its camera.
fn usable(
    picture: Result<Picture, DatasetError>,
    frame: &Frame,
    focal: Option<f64>,
    failure: &mut Option<anyhow::Error>,
) -> Option<(Picture, Camera)> {
    let picture = picture.ok()?;
    match camera_of(&picture, frame.intrinsics, None, focal) {
        Ok(camera) => Some((picture, camera?)),
        Err(e) => {
            *failure = Some(e);
            None
        }
    }
}

/// A depth picture: millimetres in 16 bits, 0 and the largest number where nothing was measured.
struct Depth {
    width: usize,
    height: usize,
    values: Vec<u16>,
}

impl Depth {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
        let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info()?;
        let info = reader.info();
        let (width, height) = (info.width as usize, info.height as usize);
        anyhow::ensure!(
            info.color_type == png::ColorType::Grayscale && info.bit_depth == png::BitDepth::Sixteen,
            "{}: wanted 16 bits of grey",
            path.display()
        );
        let size = reader.output_buffer_size().context("a picture too large")?;
        let mut bytes = vec![0; size];
        reader.next_frame(&mut bytes)?;
        let values = bytes.chunks_exact(2).map(|b| u16::from_be_bytes([b[0], b[1]])).collect();
        Ok(Self { width, height, values })
    }

    /// Where the front of what is in a box is, in the camera's axes: the median depth in the middle half of the box, along
    /// the ray of its middle. `None` for a box that the edge may cut off, or without depth.
    fn place(&self, seen: &SeenBox, camera: &Camera, scale: f64) -> Option<Point3<f64>> {
        let (w, h) = camera.size();
        let [x0, y0, x1, y1] = seen.area;
        if x0 <= 1.5 || y0 <= 1.5 || x1 >= f64::from(w) - 1.5 || y1 >= f64::from(h) - 1.5 {
            return None;
        }
        let (cx, cy) = (0.5 * f64::from(w), 0.5 * f64::from(h));
        let (sx, sy) = (self.width as f64 / f64::from(w), self.height as f64 / f64::from(h));
        let column = |x: f64| ((cx + (x - cx) * scale) * sx).clamp(0.0, self.width as f64 - 1.0) as usize;
        let row = |y: f64| ((cy + (y - cy) * scale) * sy).clamp(0.0, self.height as f64 - 1.0) as usize;
        let (quarter_x, quarter_y) = (0.25 * (x1 - x0), 0.25 * (y1 - y0));
        let mut all: Vec<f64> = Vec::new();
        for y in row(y0 + quarter_y)..=row(y1 - quarter_y) {
            for x in column(x0 + quarter_x)..=column(x1 - quarter_x) {
                let value = self.values.get(y * self.width + x).copied().unwrap_or(0);
                if value > 0 && value < u16::MAX {
                    all.push(f64::from(value) / 1000.0);
                }
            }
        }
        if all.len() < 10 {
            return None;
        }
        let depth = mindseye_base::stats::median(&mut all);
        let ray = camera.ray(Vector2::new(0.5 * (x0 + x1) - 0.5, 0.5 * (y0 + y1) - 0.5))?;
        Some(Point3::new(ray.x * depth, ray.y * depth, depth))
    }
}

fn text(r: &Report) -> String {
    let number = |v: Option<f64>, digits: usize| v.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
    let line = |name: &str, e: &Errors| {
        format!(
            "{name}: {} boxes ({} of no known thing); position median {} m, p90 {} m; heading median {}°; within 0.3 m {}; \
             inside the 90 % ellipsoid {}\n",
            e.boxes,
            e.unknown,
            number(e.position_m.median, 3),
            number(e.position_m.p90, 3),
            number(e.heading_deg.median, 1),
            e.within_30cm.text(2),
            e.within_90.text(2),
        )
    };
    let mut out = line("all", &r.all);
    for (class, errors) in &r.classes {
        out += &line(class, errors);
    }
    for t in &r.things {
        out += &format!(
            "thing: {} at {:.2} {:.2} {:.2} m (± {:.2}), {:.2} x {:.2} m, {} views\n",
            t.class,
            t.position[0],
            t.position[1],
            t.position[2],
            t.sigma_m,
            t.size_m[0],
            t.size_m[1],
            t.views
        );
    }
    out += &format!(
        "{} frames of context, {} queries, {} unusable; {} ms of the detector a frame; {:?}\n",
        r.context,
        r.queries,
        r.unusable,
        number(r.ms_per_frame, 0),
        r.counts
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_taken_in_the_middle_of_a_box() {
        let camera = Camera::pinhole(8, 8, 10.0, 10.0, 3.5, 3.5).unwrap();
        // 2 m in the middle four columns, 5 m beside them, nothing measured in the first row.
        let value = |k: usize| match (k / 8, k % 8) {
            (0, _) => 0,
            (_, 2..6) => 2000,
            _ => 5000,
        };
        let depth = Depth { width: 8, height: 8, values: (0..64).map(value).collect() };
        let seen = |area| SeenBox { class: 0, score: 1.0, area };
        let at = depth.place(&seen([1.6, 1.6, 6.4, 6.4]), &camera, 1.0).unwrap();
        assert!((at - Point3::new(0.0, 0.0, 2.0)).norm() < 1e-9, "{at}");
        assert!(depth.place(&seen([0.0, 2.0, 4.0, 6.0]), &camera, 1.0).is_none(), "cut off");
        let none = Depth { values: vec![u16::MAX; 64], ..depth };
        assert!(none.place(&seen([1.6, 1.6, 6.4, 6.4]), &camera, 1.0).is_none(), "not measured");
    }
}
