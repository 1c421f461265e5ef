//! Object detectors that users bring: an ONNX file with the classes of COCO, or others, on the embedded backend.
//!
//! Which layout a file has is seen from the names and shapes of its inputs and outputs ([`Layout`]):
//!
//! | layout | input | outputs |
//! |---|---|---|
//! | DETR-like (RT-DETR, D-FINE, DEIM) | picture stretched to `[1, 3, h, w]`, 0..1; perhaps the true size, `[1, 2]` integers | `labels [1, n]`, `boxes [1, n, 4]` (corners), `scores [1, n]` |
//! | YOLO-like, rows | letterboxed, grey 114, 0..1 | `[1, n, 4 + 1 + classes]`: centre, size, objectness, classes |
//! | YOLO-like, columns | the same | `[1, 4 + classes, n]` |
//!
//! YOLO's boxes are in pixels of the network's input; they are thinned here (class by class, by overlap). Graphs that leave
//! the decoding of boxes to the caller (YOLOX as its authors export it) have the shapes of the second row, and cannot be
//! told from them: export those with decoding.

mod decode;
mod names;

use std::path::{Path, PathBuf};

use mindseye_base::scale::{Scaler, WrongSize};

use crate::backend::{
    Backend, BackendError, DataType, Dim, Port, PrepareOptions, RtenBackend, Session, Tensor, describe,
};
use crate::onnx::{Model, OnnxError};

/// One thing in a picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Detection {
    /// Position in [`Detector::classes`].
    pub class: usize,
    /// How sure the network is, 0..1.
    pub score: f32,
    /// Left, top, right and bottom edge in pixels of the picture; 0 is the edge of the first pixel.
    pub area: [f32; 4],
}

/// How a detector's inputs and outputs are laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// Labels, boxes and scores. `sizes` is the input that takes the picture's size; without one, boxes are in pixels of
    /// the network's input.
    Detr {
        /// Name of the input of the picture's width and height.
        sizes: Option<String>,
        /// Name of the output of class numbers.
        labels: String,
        /// Name of the output of boxes.
        boxes: String,
        /// Name of the output of scores.
        scores: String,
    },
    /// One tensor of boxes with a score per class.
    Yolo {
        /// Its name.
        output: String,
        /// `[1, 4 + classes, n]` rather than `[1, n, 4 + classes]`.
        columns: bool,
        /// A score for there being anything precedes the classes.
        objectness: bool,
    },
}

/// Why a detector cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DetectorError {
    /// The file cannot be run, or a run failed.
    #[error("detector: {0}")]
    Backend(#[from] BackendError),
    /// The file is not an ONNX model.
    #[error("detector {}: {source}", path.display())]
    Onnx {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: OnnxError,
    },
    /// Inputs and outputs are of no known layout.
    #[error(
        "detector {}: neither labels, boxes and scores nor boxes with a score per class: it takes {takes} and gives {gives}",
        path.display()
    )]
    Layout {
        /// The file.
        path: PathBuf,
        /// Its inputs.
        takes: String,
        /// Its outputs.
        gives: String,
    },
    /// The names of the classes are not known.
    #[error(
        "detector {}: the names of its classes are neither in the file nor in {}; write them to one of these, a class a \
         line, or name the file with `classes`",
        path.display(), looked.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NoClasses {
        /// The file.
        path: PathBuf,
        /// Where names were looked for.
        looked: Vec<PathBuf>,
    },
    /// A file of class names cannot be read.
    #[error("class names {}: {source}", path.display())]
    Classes {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There are more or fewer classes than names.
    #[error("detector {}: {classes} classes, but {names} names in {}", path.display(), from.display())]
    ClassCount {
        /// The file.
        path: PathBuf,
        /// Classes that the network scores.
        classes: usize,
        /// Names.
        names: usize,
        /// Where the names are from.
        from: PathBuf,
    },
    /// The picture's bytes do not make up its size.
    #[error("detector: {0}")]
    Picture(#[from] WrongSize),
    /// An output is not what its port says.
    #[error("detector: output {name:?} has shape {shape:?} and {values} values; wanted {wanted}")]
    Output {
        /// The output.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Values in it.
        values: usize,
        /// What was wanted.
        wanted: &'static str,
    },
}

/// Side of the input where the file leaves it open (pixels).
const OPEN_SIDE: usize = 640;
/// Grey around a letterboxed picture.
const LETTERBOX_GREY: f32 = 114.0 / 255.0;
/// Boxes of one class that overlap by more than this share of their union are one thing.
const OVERLAP_MAX: f32 = 0.5;
/// Most detections of one picture.
pub const DETECTIONS_MAX: usize = 100;

/// A loaded detector, for one thread.
pub struct Detector {
    path: PathBuf,
    session: Box<dyn Session>,
    layout: Layout,
    /// Name, width and height of the input.
    input: (String, usize, usize),
    classes: Vec<String>,
    scaler: Option<Scaler>,
    /// Of the input, reused.
    pixels: Vec<f32>,
}

impl std::fmt::Debug for Detector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { path, layout, input, classes, .. } = self;
        write!(f, "Detector({}, {layout:?}, {input:?}, {} classes)", path.display(), classes.len())
    }
}

impl Detector {
    /// Loads a file, each run on `threads` threads (0: the backend's choice). Names of classes come from `classes` where it
    /// is given, else from the model's metadata, else from a text file beside it.
    ///
    /// # Errors
    /// [`DetectorError`] says what of the file is not understood.
    pub fn open(path: &Path, classes: Option<&Path>, threads: usize) -> Result<Self, DetectorError> {
        let engine = RtenBackend.prepare(path, &PrepareOptions::default().with_threads(threads))?;
        let metadata = Model::load(path)
            .map_err(|source| DetectorError::Onnx { path: path.to_owned(), source })?
            .metadata;
        let (classes, from) = names::names(path, classes, &metadata)?;
        let (layout, input) = layout(engine.inputs(), engine.outputs(), classes.len()).ok_or_else(|| {
            let all = |ports: &[Port]| {
                let each = |p: &Port| format!("{} {}", p.name, describe(p));
                ports.iter().map(each).collect::<Vec<_>>().join(", ")
            };
            match scored(engine.inputs(), engine.outputs(), classes.len()) {
                Some(scored) => DetectorError::ClassCount {
                    path: path.to_owned(),
                    classes: scored,
                    names: classes.len(),
                    from,
                },
                None => DetectorError::Layout {
                    path: path.to_owned(),
                    takes: all(engine.inputs()),
                    gives: all(engine.outputs()),
                },
            }
        })?;
        Ok(Self {
            path: path.to_owned(),
            session: engine.session()?,
            layout,
            pixels: Vec::new(),
            input,
            classes,
            scaler: None,
        })
    }

    /// Names of the classes, by number.
    #[must_use]
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The layout that was recognised.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What is in a picture of `width * height * 3` bytes, the surest first, at least `score_min` sure; at most
    /// [`DETECTIONS_MAX`]. Classes without a name are left out.
    ///
    /// # Errors
    /// [`DetectorError::Picture`], [`DetectorError::Backend`], [`DetectorError::Output`].
    pub fn detect(
        &mut self,
        rgb: &[u8],
        (width, height): (usize, usize),
        score_min: f32,
    ) -> Result<Vec<Detection>, DetectorError> {
        let (picture, fit) = self.put((width, height), rgb)?;
        let found = self.run(&picture, (width, height), fit, score_min);
        self.pixels = picture.into_f32().unwrap_or_default();
        let mut found = found?;
        found.retain_mut(|d| d.class < self.classes.len() && decode::clip(&mut d.area, width, height));
        found.sort_by(|a, b| b.score.total_cmp(&a.score));
        found.truncate(DETECTIONS_MAX);
        Ok(found)
    }

    fn run(
        &mut self,
        picture: &Tensor,
        (width, height): (usize, usize),
        fit: decode::Placed,
        score_min: f32,
    ) -> Result<Vec<Detection>, DetectorError> {
        let (name, ..) = &self.input;
        match &self.layout {
            Layout::Detr { sizes, labels, boxes, scores } => {
                let size = Tensor::i64(&[1, 2], vec![width as i64, height as i64]);
                let mut inputs = vec![(name.as_str(), picture)];
                inputs.extend(sizes.as_deref().map(|name| (name, &size)));
                let mut out = [Tensor::empty(), Tensor::empty(), Tensor::empty()];
                let [of_labels, of_boxes, of_scores] = &mut out;
                let mut wanted =
                    [(labels.as_str(), of_labels), (boxes.as_str(), of_boxes), (scores.as_str(), of_scores)];
                self.session.run_into(&inputs, &mut wanted)?;
                let of_picture =
                    sizes.is_some().then_some(decode::Placed { scale: [1.0; 2], edge: [0.0; 2] });
                decode::detr([labels, boxes, scores], &out, of_picture.unwrap_or(fit), score_min)
            }
            Layout::Yolo { output, columns, objectness } => {
                let mut out = Tensor::empty();
                self.session.run_into(&[(name, picture)], &mut [(output, &mut out)])?;
                let rows = decode::Rows { columns: *columns, objectness: *objectness };
                let all = decode::yolo(output, &out, rows, fit, score_min)?;
                Ok(decode::thinned(all, OVERLAP_MAX))
            }
        }
    }

    /// The input of a picture, and where the picture lies in it.
    fn put(&mut self, from: (usize, usize), rgb: &[u8]) -> Result<(Tensor, decode::Placed), DetectorError> {
        let (_, w, h) = self.input;
        let to = match self.layout {
            Layout::Detr { .. } => (w, h),
            Layout::Yolo { .. } => {
                let scale = (w as f64 / from.0 as f64).min(h as f64 / from.1 as f64);
                let side = |n: usize, most: usize| ((n as f64 * scale).round() as usize).clamp(1, most);
                (side(from.0, w), side(from.1, h))
            }
        };
        if self.scaler.as_ref().is_none_or(|s| s.from() != from || s.to() != to) {
            self.scaler = Some(Scaler::new(from, to));
        }
        let (left, top) = ((w - to.0) / 2, (h - to.1) / 2);
        let mut values = std::mem::take(&mut self.pixels);
        values.clear();
        values.resize(3 * w * h, LETTERBOX_GREY);
        let mut at = 0;
        let scaler = self.scaler.get_or_insert_with(|| Scaler::new(from, to));
        scaler.scale(rgb, |pixel| {
            let place = (top + at / to.0) * w + left + at % to.0;
            for (channel, value) in pixel.into_iter().enumerate() {
                values[channel * w * h + place] = value / 255.0;
            }
            at += 1;
        })?;
        let scale = [to.0 as f32 / from.0 as f32, to.1 as f32 / from.1 as f32];
        let placed = decode::Placed { scale, edge: [left as f32, top as f32] };
        Ok((Tensor::f32(&[1, 3, h, w], values), placed))
    }
}

fn fixed(dim: &Dim) -> Option<usize> {
    match dim {
        Dim::Fixed(n) => Some(*n),
        _ => None,
    }
}

/// Name, width and height of the input that takes the picture.
fn picture_input(inputs: &[Port]) -> Option<(String, usize, usize)> {
    let is_picture = |p: &&Port| {
        p.dtype == DataType::F32
            && matches!(&p.shape[..], [batch, channels, _, _]
                if fixed(batch).unwrap_or(1) == 1 && fixed(channels).unwrap_or(3) == 3)
    };
    let mut all = inputs.iter().filter(is_picture);
    let (Some(port), None) = (all.next(), all.next()) else { return None };
    let side = |k: usize| fixed(&port.shape[k]).unwrap_or(OPEN_SIDE).clamp(1, 8192);
    Some((port.name.clone(), side(3), side(2)))
}

/// Layout and picture input, if they are known ones. `names` is the number of class names.
fn layout(inputs: &[Port], outputs: &[Port], names: usize) -> Option<(Layout, (String, usize, usize))> {
    let picture = picture_input(inputs)?;
    let others: Vec<&Port> = inputs.iter().filter(|p| p.name != picture.0).collect();
    let integers = |p: &Port| matches!(p.dtype, DataType::I64 | DataType::I32);
    let sizes = match &others[..] {
        [] => None,
        [one] if integers(one) && one.shape.len() == 2 && fixed(&one.shape[1]) == Some(2) => {
            Some(one.name.clone())
        }
        _ => return None,
    };
    if let [one] = outputs {
        let (columns, objectness) = yolo_shape(one, names)?;
        let output = one.name.clone();
        return sizes.is_none().then_some((Layout::Yolo { output, columns, objectness }, picture));
    }
    let boxes = the_one(outputs, "box", |p| {
        p.dtype == DataType::F32 && p.shape.len() == 3 && fixed(&p.shape[2]).unwrap_or(4) == 4
    })?;
    let labels = the_one(outputs, "label", |p| integers(p) && p.shape.len() == 2)?;
    let scores = the_one(outputs, "score", |p| p.dtype == DataType::F32 && p.shape.len() == 2)?;
    Some((Layout::Detr { sizes, labels, boxes, scores }, picture))
}

/// The output that fits by its shape, by its name where several do.
fn the_one(outputs: &[Port], name: &str, fits: impl Fn(&Port) -> bool) -> Option<String> {
    let all: Vec<&Port> = outputs.iter().filter(|p| fits(p)).collect();
    let one = match &all[..] {
        [one] => one,
        _ => all.iter().find(|p| p.name.to_ascii_lowercase().contains(name))?,
    };
    Some(one.name.clone())
}

/// Whether boxes are columns, and have an objectness, by the shape and the number of classes.
fn yolo_shape(port: &Port, names: usize) -> Option<(bool, bool)> {
    let [batch, a, b] = &port.shape[..] else { return None };
    if port.dtype != DataType::F32 || fixed(batch).unwrap_or(1) != 1 {
        return None;
    }
    let (a, b) = (fixed(a), fixed(b));
    let found = [(b, 5, (false, true)), (a, 4, (true, false)), (b, 4, (false, false)), (a, 5, (true, true))];
    found.into_iter().find(|(dim, more, _)| *dim == Some(names + more)).map(|(.., layout)| layout)
}

/// Classes that a YOLO-like output of another number of classes than `names` would have.
fn scored(inputs: &[Port], outputs: &[Port], names: usize) -> Option<usize> {
    let ([one], [_]) = (outputs, inputs) else { return None };
    picture_input(inputs)?;
    let [_, a, b] = &one.shape[..] else { return None };
    let (columns, attributes) = match (fixed(a), fixed(b)) {
        (Some(a), Some(b)) if a < b => (true, a),
        (_, Some(b)) => (false, b),
        (Some(a), None) => (true, a),
        _ => return None,
    };
    attributes.checked_sub(if columns { 4 } else { 5 }).filter(|n| *n > 0 && *n != names)
}

#[cfg(test)]
mod tests;
